"""The Long Range Arena: its generated sets, and the files of its release."""
