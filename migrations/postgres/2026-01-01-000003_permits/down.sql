DROP FUNCTION take_permit;
DROP FUNCTION permits_now;
DROP TABLE permits;
