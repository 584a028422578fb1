"""What passes use to read and rewrite a functional ATen graph."""
