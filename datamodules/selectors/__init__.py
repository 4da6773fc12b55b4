"""Selection methods, one file each."""

from datamodules.selectors.base import SelectionContext, Selector
from datamodules.selectors.dots import Dots
from datamodules.selectors.uniform import Uniform

__all__ = ["Dots", "SelectionContext", "Selector", "Uniform"]
