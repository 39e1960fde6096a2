/// Moves money.
#[must_use]
pub async fn transfer(
    __a0: State<Db>,
    __idem: ::idem_runtime::__private::Idem<
        Json<Transfer>,
        ::idem_runtime::__private::EngineInRouterState,
    >,
) -> ::idem_runtime::__private::Guarded<Result<Json<Receipt>, Problem>> {
    let __policy: &'static ::idem_runtime::__private::Policy = {
        const __IDEM_POLICY: ::idem_runtime::__private::Policy = ::idem_runtime::__private::Policy::new(
                ::idem_runtime::__private::Anchor::header("Idempotency-Key"),
            )
            .ttl(::core::time::Duration::from_millis(86400000));
        &__IDEM_POLICY
    };
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::probe::Fallback as _;
        ::idem_runtime::__private::probe::Of::<
            Result<Json<Receipt>, Problem>,
        >::idem_answer_is_complete();
    }
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::transaction::Fallback as _;
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<State<Db>>::COUNT,
        );
        const _: () = ::idem_runtime::__private::transaction::none(
            ::idem_runtime::__private::transaction::Of::<Json<Transfer>>::COUNT,
        );
    }
    ::idem_runtime::__private::run(
            __idem,
            __policy,
            move |__last: Json<Transfer>| ::idem_runtime::__private::boxed(async move {
                #[allow(
                    unreachable_code,
                    clippy::diverging_sub_expression,
                    clippy::empty_loop,
                    clippy::let_unit_value,
                    clippy::let_with_type_underscore,
                    clippy::needless_return,
                )]
                if false {
                    let __never: Result<Json<Receipt>, Problem> = loop {};
                    return __never;
                }
                let __args = (__a0, __last);
                let State(db) = __args.0;
                let Json(mut body) = __args.1;
                #[allow(unused_braces)]
                {
                    let policy = db.move_money(&mut body).await?;
                    Ok(Json(policy))
                }
            }),
        )
        .await
}
