"""Weights & Biases (W&B): `pip install "combiner-jax[wandb]"`, then `wandb login`, or WANDB_MODE=offline."""

import contextlib
import importlib
import json
import os
import shlex
import shutil
import uuid
from pathlib import Path
from typing import Any

from combiner import atomic, paths
from combiner.monitoring.trackers.tracker import Run, Tracker, register

FILE = 'wandb.json'
PROJECT = 'combiner'  # unless WANDB_PROJECT names another one
# How long the library waits for its server: at the start, and for the last uploads at the end.
START_SECONDS = 30.0
FINISH_SECONDS = 30.0


@register('wandb')
class WeightsAndBiases(Tracker):
    """Logs to the W&B run whose id WORKDIR/wandb.json keeps, each step once, however often training is continued.

    W&B takes steps only in rising order, and takes nothing back. So a step that it has and that a continued training
    takes again is left out: on a CPU it is bitwise the same. What W&B has is the answer of its server. In offline mode
    it is what the commands that ended have written to their folders, by wandb.json; the folder of a command that was
    killed, whose last lines are lost, is deleted and its steps are logged again. Only if that folder was uploaded
    meanwhile, it is kept, and the steps up to the checkpoint count as known.

    The values of a step are held back until the next one begins, so that it is there with all its values or not at all.
    """

    @classmethod
    def check(cls) -> None:
        """Raises ValueError if the package is missing, or nobody is logged in and the mode is not offline."""
        wandb = _library()
        if not _offline(wandb) and not wandb.login(prompt=False, verify=False):
            raise ValueError(
                '--tracker=wandb: nobody is logged in to W&B; run `wandb login`, set WANDB_API_KEY, or set '
                'WANDB_MODE=offline and upload later with `wandb sync`'
            )

    @classmethod
    def view(cls, workdir: paths.AnyPath) -> str:
        """Returns the address of the run; for an offline one, the command that uploads it."""
        return _read(workdir / FILE).get('view', '')

    def __init__(self, run: Run) -> None:
        wandb = _library()
        known = _read(run.workdir / FILE)
        last = _last_offline_step(run, known)
        self._file, self._step, self._values = run.folder / FILE, -1, {}
        self._run = wandb.init(
            id=known.get('id') or uuid.uuid4().hex[:8],
            resume='allow',
            dir=str(run.folder),
            project=os.environ.get('WANDB_PROJECT') or PROJECT,
            name=run.workdir.name,
            # Silent, and leaving the output alone: a training has lines of its own.
            settings=wandb.Settings(
                console='off', silent=True, init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS
            ),
        )
        self._run.config.update({**run.config, 'commit': run.commit}, allow_val_change=True)
        folder = Path(self._run.dir).parent.name
        if _offline(wandb):
            view = f'wandb sync --yes {shlex.quote(str(run.workdir / "wandb"))}/offline-run-*-{self._run.id}'
        else:
            last, folder, view = self._run.step - 1, '', self._run.url
        self._known = {'id': self._run.id, 'last_step': last, 'folder': folder, 'view': view}
        self._write()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Holds the values of a step back until the next step; leaves out steps that W&B has."""
        if step <= self._known['last_step']:
            return
        if step != self._step:
            self._send()
        self._step = step
        self._values |= values

    def close(self) -> None:
        """Sends the last step and ends the run; what is not uploaded by then stays on the disk."""
        self._send()
        self._run.finish()
        self._known |= {'last_step': max(self._step, self._known['last_step']), 'folder': ''}
        self._write()

    def _send(self) -> None:
        if self._values:
            self._run.log(self._values, step=self._step)
            self._values = {}

    def _write(self) -> None:
        atomic.write_text(self._file, json.dumps(self._known, indent=2) + '\n')


def _last_offline_step(run: Run, known: dict[str, Any]) -> int:
    """Returns the last step in the folders of offline commands; deletes that of a command that was killed."""
    if known.get('folder'):
        folder = run.workdir / 'wandb' / known['folder']
        if list(folder.glob('*.synced')):
            return run.step
        shutil.rmtree(folder, ignore_errors=True) if isinstance(folder, Path) else folder.rmtree(missing_ok=True)
    return known.get('last_step', -1)


def _library() -> Any:
    try:
        return importlib.import_module('wandb')
    except ImportError as error:
        raise ValueError(
            f'--tracker=wandb needs the package wandb ({error}): pip install "combiner-jax[wandb]", or '
            'pip install wandb; or leave wandb out of --tracker'
        ) from None


def _offline(wandb: Any) -> bool:
    """Returns whether WANDB_MODE, or a settings file of W&B, keeps it from its server."""
    return wandb.setup().settings.mode in ('offline', 'dryrun', 'disabled')


def _read(path: paths.AnyPath) -> dict[str, Any]:
    """Returns the content of wandb.json; {} if there is none, or if it is damaged: then the run gets a new id."""
    found: Any = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(paths.content(path))
    return found if isinstance(found, dict) else {}
