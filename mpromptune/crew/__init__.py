"""Crews: several processes that share the calls of one search."""
