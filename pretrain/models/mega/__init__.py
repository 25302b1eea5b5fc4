"""MEGA (arXiv 2209.10655): ``model`` reads from the top."""

from .config import MegaConfig
from .model import Mega

__all__ = ["Mega", "MegaConfig"]
