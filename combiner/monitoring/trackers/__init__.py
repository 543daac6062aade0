"""Places that show the curves of a run while it trains, one file for each; importing this package registers them."""

from combiner.monitoring.trackers import tensorboard, wandb
from combiner.monitoring.trackers.tracker import Tracker, names, parse, views

__all__ = ['Tracker', 'names', 'parse', 'tensorboard', 'views', 'wandb']
