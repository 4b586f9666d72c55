"""The machine: files, memory, progress, the files that come along."""
