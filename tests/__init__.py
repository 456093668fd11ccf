"""Tests; a package, so that no other package named `tests` on a host is taken for it."""
