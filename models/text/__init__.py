"""Models of text that take any encoding: a causal language model, and a bidirectional classifier.

``CausalLM`` shows how encodings, caches and memories work together.
"""

from .bert import Bert, released_options, released_weights
from .body import Body
from .cache import Cache, Kept, Memory
from .heads import Classifier, SpanFinder
from .language import CausalLM, generate

__all__ = [
    "Bert",
    "Body",
    "Cache",
    "CausalLM",
    "Classifier",
    "Kept",
    "Memory",
    "SpanFinder",
    "generate",
    "released_options",
    "released_weights",
]
