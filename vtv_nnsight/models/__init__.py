"""The models, one family each: plain torch first, then its traceable model."""
