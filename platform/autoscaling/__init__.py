"""How many replicas there are to be: rules that read signals, what people asked for, and notices of the end."""
