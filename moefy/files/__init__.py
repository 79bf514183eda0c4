"""Bytes on disk: headers, shards, buffers, locks, saved states, publication."""
