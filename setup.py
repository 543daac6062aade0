"""Installs the package `combiner`; constraints.txt and constraints-newest.txt hold the versions it is tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall("^__version__ = '(.+)'$", (ROOT / 'combiner' / '__init__.py').read_text(encoding='utf-8'), re.M)[0]
# The public address of this repository, such as 'https://github.com/OWNER/NAME'. Whoever publishes sets it. Without it
# the package has no links, and package indexes refuse it.
REPOSITORY = ''


def readme() -> str:
    """Returns README.md, with absolute addresses for its pictures and links if there is a repository.

    Relative addresses work in a clone and in a fork, but not on the page of a package index.
    """
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    if not REPOSITORY:
        return text

    def absolute(found: re.Match[str]) -> str:
        before, path = found.groups()
        kind = 'raw' if path.endswith(('.png', '.svg', '.jpg', '.gif')) else 'blob'
        return f'{before}{REPOSITORY}/{kind}/v{VERSION}/{path}'

    code = re.compile(r'(^```.*?^```)', re.MULTILINE | re.DOTALL)  # every second part is code
    parts = code.split(text)
    parts[::2] = [re.sub(r'(\]\(|(?:src|href)=")(?!\w+:|#)([^)"\s]+)', absolute, part) for part in parts[::2]]
    return ''.join(parts)


ADDRESSES = {
    'Repository': REPOSITORY,
    'Documentation': f'{REPOSITORY}/tree/v{VERSION}/docs',
    'Changelog': f'{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md',
    'Issues': f'{REPOSITORY}/issues',
}

setup(
    name='combiner-jax',
    version=VERSION,
    description='Combiner: full attention with sparse computation cost, in JAX and Flax',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    project_urls=ADDRESSES if REPOSITORY else {},
    keywords=['attention', 'efficient attention', 'long sequences', 'transformer', 'JAX', 'Flax', 'Pallas'],
    # The configs are installed too, as part of the package, so that `--config configs/photos.py` works everywhere.
    packages=[*find_packages(include=['combiner', 'combiner.*']), 'combiner.configs'],
    package_dir={'combiner.configs': 'configs'},
    package_data={'combiner': ['py.typed']},
    entry_points={
        'console_scripts': [
            'combiner-train = combiner.train:command',
            'combiner-evaluate = combiner.evaluate:command',
            'combiner-sample = combiner.sample:command',
            'combiner-export = combiner.export:command',
            'combiner-inspect = combiner.data.inspect:command',
            'combiner-generate = combiner.data.generate:main',
            'combiner-prepare = combiner.data.prepare:main',
        ]
    },
    python_requires='>=3.11,<3.15',  # ml_collections calls load_module, which is gone from 3.15 on
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',
        'clu>=0.0.12',
        'etils[epath]>=1.12',
        'flax>=0.12,<0.13',
        'grain>=0.2.18,<0.3',
        'importlib_resources>=6.4',
        'jax>=0.10,<0.13',
        'jaxtyping>=0.3.2',
        'matplotlib>=3.9',
        'ml-collections>=1.1',
        'numpy>=2.0',
        'optax>=0.2.5,<0.3',
        'orbax-checkpoint>=0.12,<0.13',
        'pillow>=11.0',
        'PyYAML>=6.0',
        'safetensors>=0.7,<0.9',
        'scikit-image>=0.25',
        'scikit-learn>=1.6',
        'scipy>=1.14',
        'sentencepiece>=0.2.3',
        'tensorboardX>=2.6.4',
        'tensorflow-datasets>=4.9.9',
        'tqdm>=4.66',
    ],
    extras_require={
        'dev': [
            'beartype',
            'ipykernel',  # with nbclient, runs the notebook
            'nbclient',
            'pre-commit',
            'pyright[nodejs]',
            'pytest',
            'pytest-xdist',
            'ruff',
            'setuptools>=77',
            'submitit',
        ],
        'docs': ['latex2mathml>=3.78', 'mkdocs-material>=9.7', 'mkdocstrings[python]>=1.0'],
        'tpu': ['jax[tpu]'],
        # Compiles TPU programs where there is no TPU; not together with `tpu`, which brings its own libtpu.
        'tpu-aot': ['libtpu'],
        'cuda': ['jax[cuda13]'],
        'cuda12': ['jax[cuda12]'],  # for drivers that are too old for CUDA 13; not together with `cuda`
        # Compiles GPU programs where there is no GPU, of the version of JAX; not together with `cuda`. JAX asks cuDNN
        # for its version before it compiles for it.
        'gpu-aot': ['jax-cuda13-plugin', 'nvidia-cuda-nvcc', 'nvidia-cudnn-cu13', 'nvidia-nvvm'],
        'slurm': ['submitit'],
        'gcs': ['gcsfs>=2026.4'],  # for paths that begin with gs://
        'wandb': ['wandb>=0.19'],  # for --tracker=wandb
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Programming Language :: Python :: 3.14',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
        *([] if REPOSITORY else ['Private :: Do Not Upload']),
    ],
)
