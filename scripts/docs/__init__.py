"""Tables in the documents, made from the code."""
