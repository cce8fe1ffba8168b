"""``attach``: encodings on the models of other libraries. Only this part of irpe imports those."""

from .attach import Report, attach, detach
from .base import Site, register_host
from .carry import located
from .maps import attention_maps

__all__ = ["Report", "Site", "attach", "attention_maps", "detach", "located", "register_host"]
