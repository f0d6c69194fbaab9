"""What a person looks at: summaries, pictures, pages, measures of quality."""
