"""From raw text to training rows: parquet shards, tokenizer, packing, loader."""
