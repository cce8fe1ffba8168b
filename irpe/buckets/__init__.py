"""Bucket functions: pure functions from integer offsets (query - key) to bucket ids."""

from .clip import ClipBuckets, OneBucket
from .ids import BucketFunction, BucketIds, prefix_ids
from .image import ImageBuckets
from .steps import StepIndex

__all__ = [
    "BucketFunction",
    "BucketIds",
    "ClipBuckets",
    "ImageBuckets",
    "OneBucket",
    "StepIndex",
    "prefix_ids",
]
