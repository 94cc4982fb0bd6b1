"""Data: the data sets, the loader that feeds batches to a device, and the teacher file."""

from cupyep.data.dataset import VIEWS, Dataset, Split
from cupyep.data.directories import cache_directory, data_directory
from cupyep.data.image_format import ImageFormat
from cupyep.data.loader import Loader
from cupyep.data.loading import load_dataset
from cupyep.data.sources import DATASETS
from cupyep.data.teacher import TeacherFile
from cupyep.data.teacher_writer import TeacherWriter

__all__ = [
    "DATASETS",
    "Dataset",
    "ImageFormat",
    "Loader",
    "Split",
    "TeacherFile",
    "TeacherWriter",
    "VIEWS",
    "cache_directory",
    "data_directory",
    "load_dataset",
]
