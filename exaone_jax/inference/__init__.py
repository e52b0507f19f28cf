"""Generation: sampling, decoding with or without MTP drafts, text in and text out."""
