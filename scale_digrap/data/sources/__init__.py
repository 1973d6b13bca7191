"""Data sets as they are published → records to write: ``vqa`` (VQAv2 and its kin), ``lavis`` (annotation lists),
``labelled`` (image folders and lists with classes)."""
