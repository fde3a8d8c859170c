"""Put first on PYTHONPATH: the real hpcft with ``train`` replaced by a stand-in that trains nothing."""

from pkgutil import extend_path

__version__ = "stand-in"
__path__ = extend_path(__path__, __name__)
