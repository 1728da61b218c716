"""PT2 archives: what ``torch.export.save`` writes, read as data and written without traces of the machine."""
