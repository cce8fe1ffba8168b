"""``attach``: add encodings to models of other libraries. No other package imports them."""

from .attach import Report, attach, detach
from .base import Site, register_host
from .carry import located
from .maps import attention_maps

__all__ = ["Report", "Site", "attach", "attention_maps", "detach", "located", "register_host"]
