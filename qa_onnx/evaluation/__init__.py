"""SQuAD files, the official metric, and where answers are wrong."""
