// @generated automatically by Diesel CLI.

diesel::table! {
    use crate::database::sql_types::*;

    analyses (id) {
        id -> Int8,
        task_id -> Text,
        user_id -> Nullable<Text>,
        repo_url -> Text,
        head_commit -> Nullable<Text>,
        branch -> Nullable<Text>,
        shallow -> Bool,
        state -> Text,
        started_at -> Timestamptz,
        finished_at -> Nullable<Timestamptz>,
        total_contributors -> Nullable<Int8>,
        total_lines -> Nullable<Int8>,
        total_files -> Nullable<Int8>,
        skipped_files -> Nullable<Int8>,
        result -> Nullable<Json>,
        error -> Nullable<Text>,
        worker -> Nullable<Text>,
        attempts -> Int4,
        deaths -> Int4,
    }
}

diesel::table! {
    use crate::database::sql_types::*;

    contributors (analysis_id, rank) {
        analysis_id -> Int8,
        rank -> Int4,
        email -> Text,
        lines -> Int8,
    }
}

diesel::table! {
    use crate::database::sql_types::*;

    permits (scope, holder) {
        scope -> Text,
        holder -> Text,
        ends_ms -> Int8,
    }
}

diesel::table! {
    use crate::database::sql_types::*;

    user_tokens (user_id, host) {
        user_id -> Text,
        host -> Text,
        ciphertext -> Text,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::joinable!(contributors -> analyses (analysis_id));

diesel::allow_tables_to_appear_in_same_query!(analyses, contributors, permits, user_tokens,);
