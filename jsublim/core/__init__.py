"""What every room stands on: files, strict reading, sections of a config, progress, servers and buckets."""
