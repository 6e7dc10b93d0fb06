"""One attention core with pluggable masks and positions, for sequences, irregular time, images, graphs and points."""

from . import domains as domains
from .domains import Grid as Grid, Points as Points, Sequence as Sequence, Timeline as Timeline
from . import masks as masks
