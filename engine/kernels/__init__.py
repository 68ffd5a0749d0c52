"""What measurement justified, beside its plain torch reference."""
