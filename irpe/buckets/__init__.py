"""Pure functions from integer offsets to bucket ids."""

from .ids import BucketFunction, BucketIds, bucket_functions, bucket_ids
from .image import ImageBuckets
from .text import ClipBuckets, LogBuckets, OneBucket

__all__ = [
    "BucketFunction",
    "BucketIds",
    "ClipBuckets",
    "ImageBuckets",
    "LogBuckets",
    "OneBucket",
    "bucket_functions",
    "bucket_ids",
]
