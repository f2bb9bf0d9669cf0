"""Prompt sets, judges and measures: does the model take back what it should, and nothing else?"""
