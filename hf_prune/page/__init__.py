"""What people look at: one HTML file, and pictures, about one run or several."""

from .pictures import training_picture
from .runs import LATENCY, RunFolder, read_run
from .writing import write_page

__all__ = ["LATENCY", "RunFolder", "read_run", "training_picture", "write_page"]
