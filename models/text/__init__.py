"""Text models with any encoding: causal language model, classifier, span finder, BERT.

``CausalLM`` shows how to use encodings with caches and memories.
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
