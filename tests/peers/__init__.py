"""Each adapter against the peer's own package: run by `make test-peers`, skipped where the package is missing."""
