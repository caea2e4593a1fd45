"""The version: the package, the User-Agent header and the build all read it from here."""

__version__ = "0.1.0"
