"""Text to rows: shards, tokenizer, packing, loader."""
