"""Pure functions from integer offsets to bucket ids."""

from .ids import BucketIds, bucket_ids
from .image import ImageBuckets

__all__ = ["BucketIds", "ImageBuckets", "bucket_ids"]
