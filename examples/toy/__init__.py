"""Tiny pipelines and pairs of photographs, for the demo and the tests."""
