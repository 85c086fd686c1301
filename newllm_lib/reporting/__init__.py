"""What a run tells its reader: records, reports, pictures, comparisons, progress; nothing here needs torch."""
