"""Making data folders and tokenizers; no rank of a training job runs this."""
