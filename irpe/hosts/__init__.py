"""Other people's models, equipped. The only place in irpe that knows other libraries."""

from .attach import Report, attach, detach
from .groups import param_groups
from .place import located

__all__ = ["Report", "attach", "detach", "located", "param_groups"]
