#!/usr/bin/env bash
# Builds the documentation as a website in site/; a warning is an error. Arguments go to mkdocs:
#
#     bash scripts/docs.sh [--site-dir DIR]
#
# To read it while writing it: .venv/bin/python -m mkdocs serve
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh" docs
cd "$root"
NO_MKDOCS_2_WARNING=1 .venv"${STACK:+-$STACK}"/bin/python -m mkdocs build --strict --quiet "$@"
echo "wrote the site: python -m http.server --directory site, then http://localhost:8000"
