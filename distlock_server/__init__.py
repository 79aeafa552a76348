"""distlock: a lock table on an embedded key-value store, served over gRPC."""
