"""Text to tokens, rows, shards and batches.

The modules, in the order of the data:

    text            corpus, sources/ (places), formats/ (kinds of files), hub, documents, slices
    tokens          tokenizer, bpe, encoding; token_batches, tokenizing; synthetic
    selection       holdout (validation), duplicates
    rows            packing, split_writer, row_files, document_table, file_writer
    shards          shards (layout and description), part_job, parts, part_plan, builders, build
    training        rows, batches
    inspection      provenance, statistics, build_times
    tools           arrays, read_ahead, allocator
"""
