"""Prepares one data set of TFDS as ARRAY_RECORD: the part of `combiner.data.prepare` that needs TensorFlow.

    ENVIRONMENT/bin/python -P prepare_tfds.py NAME[/CONFIG]/VERSION --data_dir DIR [--beam_options OPTIONS]

Downloads go to DIR/downloads, where TFDS finds them again and checks their checksums; files that you have downloaded
yourself are read from DIR/downloads/manual. The set is written to a temporary folder and moved when it is complete.
"""

import argparse
import importlib
import shlex
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

# TFDS registers these builders only when they are imported.
MODULES = {'c4': 'tensorflow_datasets.text.c4', 'wiki40b': 'tensorflow_datasets.text.wiki40b'}


def without_beam(builder: Any) -> None:
    """Makes the builder of Wiki-40B read its records one by one: on one machine, Beam would hold all of them in memory.

    The records, their keys and so their order in TFDS stay the same.
    """

    def examples(files: str) -> Iterator[tuple[str, dict[str, str]]]:
        for example in builder.read_tfrecord_as_examples(files):
            fields = example.features.feature
            record = {name: fields[name].bytes_list.value[0].decode() for name in builder.info.features}
            yield record['wikidata_id'] + record['text'], record

    original = builder._split_generators
    builder._split_generators = lambda dl_manager: {
        split.name: examples(split.gen_kwargs['filepaths']) for split in original(dl_manager)
    }


def download_config(beam_options: str | None) -> Any:
    """Returns TFDS's settings; prepared copies in Google's bucket are not used, as they have another file format."""
    if beam_options is None:
        return tfds.download.DownloadConfig(try_download_gcs=False)
    pipeline_options = importlib.import_module('apache_beam.options.pipeline_options')
    parsed = pipeline_options.PipelineOptions(shlex.split(beam_options))
    return tfds.download.DownloadConfig(try_download_gcs=False, beam_options=parsed)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('full_name', help='for instance wiki40b/en/1.3.0')
    parser.add_argument('--data_dir', required=True)
    parser.add_argument('--beam_options', help='for c4: options of the Beam pipeline, in one argument')
    options = parser.parse_args()
    name, _, version = options.full_name.rpartition('/')
    dataset = name.partition('/')[0]
    if dataset in MODULES:
        importlib.import_module(MODULES[dataset])
    builder = tfds.builder(f'{name}:{version}', data_dir=options.data_dir)
    if dataset == 'wiki40b':
        without_beam(builder)
    builder.download_and_prepare(
        download_dir=f'{options.data_dir}/downloads',
        download_config=download_config(options.beam_options),
        file_format='array_record',
    )


if __name__ == '__main__':
    main()
