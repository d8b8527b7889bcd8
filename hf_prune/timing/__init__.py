"""What a model's parts cost in time, measured on the spot: a table of widths, and the widths that a time allows."""

from .choosing import Option, choose_widths
from .stopwatch import Conditions, Stopwatch
from .table import LatencyTable, measured_table

__all__ = ["Conditions", "LatencyTable", "Option", "Stopwatch", "choose_widths", "measured_table"]
