"""Data sets, preprocessing and augmentation.  No function downloads anything."""

from .augment import Normalize, RandomCropFlip, RandomWarp
from .cifar import CIFAR100_MEAN, CIFAR100_STD, Cifar, CifarFileError, load_cifar10, load_cifar100
from .dataset_rows import DatasetRows
from .folders import ImageFolder, ImageFolderDataset, find_images, load_image_folder
from .image_files import ImageFileError, read_images
from .inputs import Drawings, Photographs, Preprocessing, Tokens, Vectors
from .omniglot import Omniglot, load_omniglot

__all__ = [
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "Cifar",
    "CifarFileError",
    "DatasetRows",
    "Drawings",
    "ImageFileError",
    "ImageFolder",
    "ImageFolderDataset",
    "Normalize",
    "Omniglot",
    "Photographs",
    "Preprocessing",
    "RandomCropFlip",
    "RandomWarp",
    "Tokens",
    "Vectors",
    "find_images",
    "load_cifar10",
    "load_cifar100",
    "load_image_folder",
    "load_omniglot",
    "read_images",
]
