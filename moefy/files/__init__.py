"""Bytes on disk: headers, shards, buffers, locks, what a stopped run goes on with, publication."""
