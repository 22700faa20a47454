DROP TABLE contributors;
DROP TABLE analyses;
