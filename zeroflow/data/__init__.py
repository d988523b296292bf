"""Text to tokens, rows, shards and batches.

What is where, in the order of the data:

    text            corpus, sources/ (places), formats/ (kinds of files), hub, documents, slices
    tokens          tokenizer, bpe, encoding; token_batches, tokenizing; synthetic
    choice          holdout (validation), duplicates
    rows            packing, split_writer, row_files, document_table, file_writer
    shards          shards (layout and description), part_job, parts, part_plan, builders, build
    training        rows, batches
    looking back    provenance, statistics, build_times
    tools           arrays, read_ahead, allocator
"""
