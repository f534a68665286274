"""A rewritten model as files: written by `fastgen.export`, run by `fastgen.load`."""
