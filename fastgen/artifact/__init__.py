"""A rewritten model as a folder: written by `fastgen.export`, run by `fastgen.load`.

    manifest.json      what the folder holds, what it needs, and a hash of every file  (manifest.py)
    graph.json         the rewritten graph, before kernels are chosen for a machine   (program.py)
    *.safetensors      the weights under the names of the model's state_dict           (weights.py)
    buffers.safetensors  what the graph reads and a state_dict does not hold
    generation_config.json, explain.json, tokenizer/

export.py writes it; load.py reads it, loaded.py is what comes out. Nothing here is unpickled and
nothing that is read is run, but a graph is a program: load what you would run. The hashes tell that
a folder is as it was written, not who wrote it.
"""
