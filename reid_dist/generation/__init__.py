"""Generation: questions to a multimodal language model about many pictures, asked once, kept, and never lost."""
